"""What a command says itself."""


def own_lines(said: str) -> list[str]:
    """The lines without gloo's, and without those of jax's GPU plugin, which says on import that there is no driver."""
    foreign = ("cudart_stub.cc", "before absl::InitializeLog()", "[Gloo] Rank")
    own = [line for line in said.splitlines() if not any(words in line for words in foreign)]
    return "\n".join(own).strip().splitlines()
