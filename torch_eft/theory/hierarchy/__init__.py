"""One network's coupled equations of NTK, dNTK and ddNTK."""
