"""How tests get a Kubernetes: a kind cluster of one node, an S3 server in it, the project's images.

``python -m tests.cluster up`` (or `make cluster`) keeps one for development, ``down`` removes it; the tests in
tests/e2e use it, or make and remove one of their own; ``lend COMMAND`` makes and removes one around a command.
FINETUNE_TEST_KUBECONFIG names a cluster to use instead.

Where kind's node image can be pulled it is used. Where no registry answers, one is made: a base of Debian packages
(`debootstrap`), Kubernetes as programs built from Go modules, kind's own node files from its module. That takes root
and, the first time, a quarter of an hour; all of it is kept below the home folder (`folder.CACHE`). A Docker daemon is
started when none answers, and stopped with all its traces when the cluster goes.

| module | what it is for |
|---|---|
| folder | where things lie; one maker at a time |
| command | run programs, with limits and last words |
| binary | the pinned programs and how they are built |
| daemon, runtime_wrapper | Docker: found, or started and stopped |
| node_image, node/ | kind's node image: pulled, read, or made |
| program_image | images of one static program |
| kind | the cluster itself |
| cluster | what tests talk to |
| node_store | images from Docker into the node |
| project_image | our images |
| object_store | S3 |
| kuberay | RayJobs |
"""
