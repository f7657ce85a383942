"""FocusDPO (arXiv 2509.01181): arrays in, arrays out.

Read in this order: `losses` (Diffusion-DPO under a weight map), `correspondence` (SPAF: which
part of the image already matches a reference), `complexity` (DPCE: where there is detail),
`weighting` (the map itself), `buckets` (how it all moves with the timestep).

Docstrings mark what the paper shows as [known] and what is this project's reading as [ours].
"""
