"""What 4 bits cost in accuracy: networks trained here on real data, fp4fx's variants and peers side by side."""
