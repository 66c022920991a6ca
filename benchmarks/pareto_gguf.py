"""A GGUF file's weights, dequantised and rounded to bfloat16, as a GGUF file again."""

from pathlib import Path

import gguf


def to_bfloat16(source: Path, target: Path) -> None:
    """Write `target` with the metadata of `source`. Vectors stay float32, as llama.cpp wants."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, *inner = field.types
            value = gguf.LlamaFileType.MOSTLY_BF16 if name == "general.file_type" else None
            content = field.contents() if value is None else int(value)
            writer.add_key_value(name, content, kind, inner[-1] if inner else None)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        rounded = gguf.quantize(values, gguf.GGMLQuantizationType.BF16)
        if values.ndim > 1:
            writer.add_tensor(tensor.name, rounded, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(tensor.name, gguf.dequantize(rounded, gguf.GGMLQuantizationType.BF16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
