"""What a command says itself."""


def own_lines(stderr: str) -> list[str]:
    """The lines of stderr without those of jax's GPU plugin, which says on import that there is no GPU driver here."""
    foreign = ("cudart_stub.cc", "before absl::InitializeLog()")
    own = [line for line in stderr.splitlines() if not any(words in line for words in foreign)]
    return "\n".join(own).strip().splitlines()
