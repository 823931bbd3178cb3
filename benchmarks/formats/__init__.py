"""The error that number formats make: NVFP4 under each of its scale rules, beside other formats of 4 and 8 bits."""
