"""The model behind HTTP: the contract of SageMaker's containers, and a page to try it.

    read the body -> rows -> batcher -> engine -> answer

Requests that arrive together share a batch. Everything that costs memory or waits is bounded: the
connections, the bytes of bodies, the rows that wait, and the patience with slow clients.
"""
