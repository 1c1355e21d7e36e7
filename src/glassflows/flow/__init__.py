"""The mathematics of GLASS transitions, without diffusers.

`noise` maps times to noise levels, and `denoise` network outputs to ẑ. `transition` holds the
coefficients of x_t → x_t′, `solver` the weights of its inner steps, `state` the tensors that
they move. `timetable` assigns network calls to transitions, and `sample` runs them on a denoiser.
"""
