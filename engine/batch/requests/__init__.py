"""The accepted fields of a line, and how a conversation becomes a prompt."""
