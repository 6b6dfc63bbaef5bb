"""Text to rows: corpora, tokenizer and chat template, packing, resumable streams.

corpus = herd.data.corpora.open_corpus(config.data)
tokenizer = herd.data.tokenizer_training.open_tokenizer(config.tokenizer, corpus)
rows = herd.data.streams.open_rows(config, tokenizer, "train", corpus=corpus)
"""
