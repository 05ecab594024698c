"""Names that engines import from the reference's transfer layer."""
