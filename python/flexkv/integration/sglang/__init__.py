"""For SGLang: the connector that its radix cache drives."""
