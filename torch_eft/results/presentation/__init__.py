"""How results show and keep themselves: short texts, notebook cells, pictures, tables, files."""
