"""Digitally reconstructed chest radiographs with exact lung masks, rendered from one CT scan.

`anatomy` reads the scan and its organ labels, `findings` places disease in it, `projection` deforms it and takes the
radiograph, `sampling` draws one phantom from (seed, split, index). `examples/make_phantoms.py` writes them as shards.
"""
