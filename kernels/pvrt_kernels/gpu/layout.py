"""The layout of codes on GPUs: the bytes of every row, in blocks of 16, blocks outermost.

A row of the checkpoint's codes [rows, groups, M] is a string of groups * M bytes (twice that for
codes of more than 8 bits). Cut into blocks of 16 bytes and transposed to [blocks, rows, 16], a
thread reads 16 bytes of one row with one load, and the threads of a warp, which take
neighbouring rows, read 512 consecutive bytes. Byte f of a row is byte f % 16 of block f // 16:
group f // M, codebook f % M. All GPU kernels read this one layout; it is as large as the
checkpoint's (the last block is filled up with zeros) and turns back into it exactly.
"""

import torch
from torch import Tensor

BLOCK_BYTES = 16


def code_bytes(codebook_size: int) -> int:
    """Bytes of one stored code: 1 for codebooks of up to 256 codewords, else 2."""
    return 1 if codebook_size <= 256 else 2


def block_count(groups: int, num_codebooks: int, codebook_size: int) -> int:
    """Blocks of 16 bytes in a row."""
    return -(-groups * num_codebooks * code_bytes(codebook_size) // BLOCK_BYTES)


def pack_codes(codes: Tensor, codebook_size: int) -> Tensor:
    """codes [rows, groups, M] integer -> uint8 [blocks, rows, 16]; entries become v mod 2^B."""
    rows = codes.shape[0]
    wide = code_bytes(codebook_size)
    if codebook_size not in (256, 65536):  # otherwise every value of the type is an index
        codes = codes & (codebook_size - 1)
    flat = codes.to(torch.int8 if wide == 1 else torch.int16).reshape(rows, -1).contiguous()
    flat = flat.view(torch.uint8)
    blocks = -(-flat.shape[1] // BLOCK_BYTES)
    if flat.shape[1] != blocks * BLOCK_BYTES:
        flat = torch.nn.functional.pad(flat, (0, blocks * BLOCK_BYTES - flat.shape[1]))
    # Transposed as 8-byte words: a quarter of an hour of byte moves becomes seconds.
    words = flat.view(torch.int64).reshape(rows, blocks, 2)
    return words.transpose(0, 1).contiguous().view(torch.uint8)


def unpack_codes(packed: Tensor, groups: int, num_codebooks: int, codebook_size: int) -> Tensor:
    """uint8 [blocks, rows, 16] -> codes [rows, groups, M], int8 or int16 as in the checkpoint."""
    blocks, rows, _ = packed.shape
    words = packed.view(torch.int64).transpose(0, 1).contiguous()
    flat = words.view(torch.uint8).reshape(rows, blocks * BLOCK_BYTES)
    wide = code_bytes(codebook_size)
    flat = flat[:, : groups * num_codebooks * wide].contiguous()
    stored = flat.view(torch.int8 if wide == 1 else torch.int16)
    return stored.reshape(rows, groups, num_codebooks)
