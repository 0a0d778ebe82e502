"""What is built and generated, as data, and the errors of every layer. Importing it costs nothing.

presets      sizes and the sampler's defaults, of the TOML files here or written out
tasks        what a graph computes
buckets      sizes of videos made from pictures; refinement: of refined ones
components   what is compiled besides the DiT
dit          the DiT's configuration
errors       what users can cause or cure
"""
