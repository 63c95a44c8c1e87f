"""Which arguments of a kernel Triton must not specialise on, so that a prompt of another length compiles nothing.

Triton compiles a kernel anew if an integer becomes 1 or a multiple of 16, or ceases to be. Counts and the strides of
index tensors do so from prompt to prompt. The strides of rows and within rows stay specialised: wide loads depend on
them.
"""

VARYING = [
    "N", "M", "K", "k", "P", "E", "S", "C", "Nq", "Nk", "blocks", "batch", "capacity", "distance", "rows", "shares",
    "heads", "chunks", "begin", "end", "span", "num_nodes", "stride_k", "stride_pb", "stride_rb", "stride_sb",
    "stride_ob", "stride_gb", "stride_cb", "stride_ib", "stride_ps", "stride_ph", "stride_ss", "stride_sr", "stride_pr",
    "stride_sh", "stride_sm",
]  # fmt: skip
