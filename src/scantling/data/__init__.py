"""Text in, batches of token ids out.

`corpora` gives documents, `tokenizers` turns text into ids, `tokens` keeps the ids of a corpus on
disk, `loading` cuts them into training and validation batches.
"""
