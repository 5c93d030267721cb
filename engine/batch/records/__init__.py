"""Records: what the output has for each line of the input, in our own form and in OpenAI's."""
