#!/usr/bin/env python3
"""embed.py NAME INPUT OUTPUT: a file's bytes as a C array with a zero at its end."""
import sys
from pathlib import Path

name, source, out = sys.argv[1:]
data = Path(source).read_bytes() + b"\0"
rows = [", ".join(str(b) for b in data[i:i + 32]) for i in range(0, len(data), 32)]
Path(out).write_text(f"extern const char {name}[];\nconst char {name}[] = {{\n" + ",\n".join(rows) + "\n};\n")
