"""The folders of the published 2Mamba trainer: a Llama's config.json whose `attention_type` names the mixer."""
