"""The mathematics of GLASS transitions (design: noise → denoise → transition → solver → sample); torch only."""
