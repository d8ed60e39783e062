"""From documents on disk to rows of tokens, exactly resumable.

`sources` finds, deduplicates and splits documents; `tokenizer` turns text into ids; `pipeline`
joins shuffling, fill-in-the-middle and packing into the iterator that training reads; `held_out`
cuts the documents kept aside into rows whose every token is predicted once.
"""
