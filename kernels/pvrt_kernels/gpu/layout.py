"""The layout of codes on GPUs: the bytes of every row, in blocks of 16, blocks outermost.

A row of the checkpoint's codes [rows, groups, M] is a string of groups * M bytes (twice that for
codes of more than 8 bits). Cut into blocks of 16 bytes and transposed to [blocks, rows, 16], a
thread reads 16 bytes of one row with one load, and the threads of a warp, which take
neighbouring rows, read 512 consecutive bytes. Byte f of a row is byte f % 16 of block f // 16:
group f // M, codebook f % M. All GPU kernels read this one layout; it is as large as the
checkpoint's (the last block is filled up with zeros) and turns back into it exactly.

Blocks hold whole groups because M is a power of two. Of 3, 5 and 6 codebooks the first 2 or 4 make
such blocks, and the rest smaller ones of 4 or 8 bytes for the same groups (`split_codebooks`).
"""

import torch
from torch import Tensor

BLOCK_BYTES = 16


def split_codebooks(num_codebooks: int) -> tuple[int, int]:
    """How many codebooks are in the blocks of 16 bytes, and how many in smaller ones."""
    main = 1 << (num_codebooks.bit_length() - 1)
    return main, num_codebooks - main


def rest_bytes(num_codebooks: int) -> int:
    """Bytes of a smaller block: of as many groups as one of 16 bytes has."""
    main, rest = split_codebooks(num_codebooks)
    return BLOCK_BYTES * rest // main


def code_bytes(codebook_size: int) -> int:
    """Bytes of one stored code: 1 for codebooks of up to 256 codewords, else 2."""
    return 1 if codebook_size <= 256 else 2


def block_count(groups: int, num_codebooks: int, codebook_size: int) -> int:
    """Blocks of 16 bytes in a row."""
    main, _ = split_codebooks(num_codebooks)
    return -(-groups * main * code_bytes(codebook_size) // BLOCK_BYTES)


def pack_codes(codes: Tensor, codebook_size: int, block_bytes: int = BLOCK_BYTES) -> Tensor:
    """codes [rows, groups, M] integer -> uint8 [blocks, rows, block_bytes], v mod 2^B."""
    rows = codes.shape[0]
    wide = code_bytes(codebook_size)
    if codebook_size not in (256, 65536):  # otherwise every value of the type is an index
        codes = codes & (codebook_size - 1)
    flat = codes.to(torch.int8 if wide == 1 else torch.int16).reshape(rows, -1).contiguous()
    flat = flat.view(torch.uint8)
    blocks = -(-flat.shape[1] // block_bytes)
    if flat.shape[1] != blocks * block_bytes:
        flat = torch.nn.functional.pad(flat, (0, blocks * block_bytes - flat.shape[1]))
    # Transposed as words: a quarter of an hour of byte moves becomes seconds.
    words = flat.view(torch.int32 if block_bytes % 8 else torch.int64).reshape(rows, blocks, -1)
    return words.transpose(0, 1).contiguous().view(torch.uint8)


def unpack_codes(packed: Tensor, groups: int, num_codebooks: int, codebook_size: int) -> Tensor:
    """What `pack_codes` made -> codes [rows, groups, M], int8 or int16 as in the checkpoint."""
    blocks, rows, block_bytes = packed.shape
    words = packed.view(torch.int32 if block_bytes % 8 else torch.int64)
    flat = words.transpose(0, 1).contiguous().view(torch.uint8).reshape(rows, blocks * block_bytes)
    wide = code_bytes(codebook_size)
    flat = flat[:, : groups * num_codebooks * wide].contiguous()
    stored = flat.view(torch.int8 if wide == 1 else torch.int16)
    return stored.reshape(rows, groups, num_codebooks)
