"""Reads the slot tables of an SSD store as docs/ssd.md describes them, without any of our C code, and says
which blocks a restart has to find: the newest record of each key, if all its ancestors are there too."""
import struct
from pathlib import Path

PAGE, RECORD = 4096, 64
HEADER = struct.Struct("<8sIIQQIIII16s16sII64sII")
RECORD_FORMAT = struct.Struct("<16s16sQQIIII")
ZERO = bytes(16)


def make_crc_table():
    table = []
    for n in range(256):
        for _ in range(8):
            n = (n >> 1) ^ (0x82F63B78 if n & 1 else 0)
        table.append(n)
    return table


CRC_TABLE = make_crc_table()


def crc32c(seed, data):
    """CRC-32C without the usual inversions, as the format has it."""
    for byte in data:
        seed = CRC_TABLE[(seed ^ byte) & 255] ^ (seed >> 8)
    return seed


class Header:
    def __init__(self, page):
        fields = HEADER.unpack(page[:HEADER.size])
        (self.magic, self.byte_order, self.version, self.block_bytes, self.slot_bytes, self.n_slots,
         self.stripe_slots, self.n_dirs, self.dir, _, self.uuid, self.epoch, self.complete, _, _,
         crc) = fields
        self.sound = (self.magic == b"FlexKVsd" and self.byte_order == 0x01020304 and
                      crc == crc32c(0xFFFFFFFF, page[:156]))


def first_page(path):
    if not path.exists():
        return bytes(PAGE)
    with path.open("rb") as f:
        return f.read(PAGE).ljust(PAGE, b"\0")


def slots_of_dir(h, directory):
    """Slot numbers of a directory, in the order of its table."""
    return [s for s in range(h.n_slots) if s // h.stripe_slots % h.n_dirs == directory]


def read_records(dirs, name="default"):
    """[(key, parent, seq, slot)] of the valid records; [] where there is no complete store."""
    headers = [[Header(first_page(Path(d) / f"{name}.{kind}")) for kind in ("table", "data")]
               for d in dirs]
    sound = [h for pair in headers for h in pair if h.sound]
    if not any(h.complete for h in sound):
        return []
    ref = next(h for h in sound if h.complete)
    epoch = max(h.epoch for h in sound)
    seed = crc32c(0xFFFFFFFF, ref.uuid)
    found = []
    for number, d in enumerate(dirs):
        table = Path(d) / f"{name}.table"
        data = table.read_bytes() if table.exists() else b""
        for local, slot in enumerate(slots_of_dir(ref, number)):
            record = data[PAGE + local * RECORD:PAGE + (local + 1) * RECORD]
            if len(record) < RECORD or record == bytes(RECORD):
                continue
            key, parent, checksum, seq, _, length, its_epoch, crc = RECORD_FORMAT.unpack(record)
            slot_seed = seed ^ (slot * 0x9E3779B1 & 0xFFFFFFFF)
            if (crc == crc32c(slot_seed, record[:60]) and its_epoch == epoch and
                    length == ref.block_bytes and key != ZERO and checksum):
                found.append((key, parent, seq, slot))
    return found


def expected_keys(records):
    """Keys that a restart must find again, exactly."""
    newest = {}
    for key, parent, seq, _ in records:
        if key not in newest or seq > newest[key][0]:
            newest[key] = (seq, parent)
    known = {}

    def reachable(key):
        path = []
        while key != ZERO and key in newest and key not in known and key not in path:
            path.append(key)
            key = newest[key][1]
        good = key == ZERO or known.get(key, False)
        for k in path:
            known[k] = good
        return good

    return {key for key in newest if reachable(key)}
