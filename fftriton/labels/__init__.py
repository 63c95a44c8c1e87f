"""SparseKV-QA: how relevant each clip of a video is to a question, from public annotations and two models.

`python -m fftriton.labels read` turns the annotations of Video-MME, EgoSchema, NExT-QA and NExT-GQA into questions, one
JSON line each. `label` has a captioner describe every clip and a scorer say how relevant each is to the question.
`split` makes the training and evaluation files from them: bench/kvtp/train.py trains KVTP's relevance predictor on the
former, and `fftriton eval --task` takes the latter.

Source: KVTP, ICCV 2025, arXiv:2503.10742, section 3.3, and the authors' code.
"""
