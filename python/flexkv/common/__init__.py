"""Configuration, layouts and responses under the names that code written for the reference uses."""
