"""Other systems' spaces and architectures, in and out. Nothing here is needed by a search; engines are imported when asked for.

`nni_hub`: cells of NNI's hub as genotypes and back, without NNI. `nni_spaces`: NNI's mutables as spaces of ours and back.
"""
