"""GGUF files, as llama.cpp reads them: metadata, tokenizer, tensor layout, writer, reader and checks."""
