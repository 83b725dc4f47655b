"""Side by side with what others would use: the same data, threads, parameters, and training time.

    python -m benchmarks.peers --minutes 10                               # vp/fashion_mnist
    python -m benchmarks.peers --config vp/digits --minutes 1 --samples 500     # a trial

Contestants, each in a process of its own:

- ours: `main.py --mode train`, in bfloat16 where the CPU has units for its products; ended by
  SIGTERM when its time is over; it saves and exits.  It is given about as many steps as fit into
  its time, in the second half of which its learning rate falls.
- ours, float32: the same in float32.
- plain: the same network, in a loop as one writes it in an afternoon (`plain_loop`).
- diffusers: `UNet2DModel` with as many parameters, trained as that library's tutorial does
  (`diffusers_loop`), with its learning rate and without an average of the weights.
- diffusers, tuned: the same with our learning rate, warm-up, clipping and decay of an average.

Their trainings take turns: each runs for a window, then is stopped (SIGSTOP) while the others have
theirs, so that slow changes of the machine affect all alike.  Time counts from the command on, with
imports and reading the data.  Images a second are those between two lines of the log inside a
window; ratios are taken between windows of one round, and their median has the error of a median.
Peak memory is VmHWM.  The held-out loss is the mean square error of the predicted noise at levels
of the chain of 1000 steps, drawn uniformly; ours is asked at the times of the same mean and
standard deviation, so that all predict the same noise at the same levels.  Each gets images as it
was trained on: dequantised, or grey levels.

`torchdiffeq_likelihood` compares the likelihoods of a run of ours.

Peers are installed into a virtual environment in the work directory, which also sees the packages
of this interpreter; with `--environment` an older one is used, and no network is needed.  Nothing
of the project imports them.  It needs Linux, for memory and signals.
"""
