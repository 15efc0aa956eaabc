"""Text and tokens: tokenizers, and the chat templates that come with weights."""
