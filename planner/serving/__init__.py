"""Serving a model over HTTP, by OpenAI's protocol, each request under a plan of its own.

In: a stock model with weights, and the budgets of a ladder. Out: an ASGI application. Imports
`planner.api` and all below it; FastAPI, uvicorn and prometheus-client come with
``pip install planner[serve]``. A request goes through the files in this order:

    http_server    connections that are too slow; stopping
    http_limits    its size, its pace, its API key
    http_app       routes, status codes, streaming, clients that go away
    chat_format    what requests and answers look like
    service        what a request means: budget, deadline, tokens, usage
    reading        threads in which prompts are made ready
    chat_prompts   messages become inputs of the model
    pictures       data URLs, and remote images from public addresses alone
    jobs           what the engine is asked to do, and what it says
    engine         one thread: admission, steps, timeouts
    waiting        the queue: who is read first, and who would be late
    governor       predicts seconds, picks a rung for a deadline, learns
    ladder         the plans there are
    running_batch  prompts and answers under different plans, read and decoded together
    scheduled_batch
                   the same, where a scheduler plans each prompt
    answer_text    tokens become text; stop texts
    metrics        what Prometheus is told
    warm_up        before all of them: plans made, run, and timed
    opening        a model's service put together
    replica        one of several such services, on a Ray cluster
    scaling        how many there are
    replicated_service
                   a service that has its answers from replicas
"""
