"""Typed configuration: the schema (pydantic), the YAML loader and readable validation errors."""
