"""Tools of every layer that know nothing of files, networks or data: the bottom of the house.

- `tensors`: broadcasting over a batch, seeds, noise that belongs to a sample; `affine`: inverse
  scalers as numbers; `gradients`: by an input
- `weights`: names and digests of weights; `decays`, `profiles`: of moving averages
- `inheritance`: which of two methods that say the same counts
- `registry`: from a name in a config to an object; `devices`: from a name to a device
- `distributed`, `preemption`: processes that share a run, and signals that ask them to stop
- `mistakes`: the errors that mistakes in the input raise, told in one message
- `ode`: solvers of ODEs, adaptive and in given steps
- `pairs`: means over all pairs of examples, and their errors
- `memory`, `threads`, `cgroups`: of the host and of devices, and the limits of a container
- `version`: of the project
"""
