"""The hosted API's protocol over HTTP, from this machine's GPU: `krea-local serve`.

    settings  what the server was started with
    jobs      the records that all others pass around; `facts` has those of the service
    store     jobs and files in SQLite, durable before anybody is told: `changes` has each
              statement, `writer` makes many in one transaction, `files` keeps the bytes
    worker    the process that owns one GPU; `workers` is how the server speaks to it
    service   the one queue, and all that the web side may ask: `board` knows what every job is at,
              `waiting` their order, `watching` who looks on, `dispatch` brings them to workers
    fetch     input images by URL; `dialling` sees to it that only public addresses are asked
    webhooks  signed, retried notices of finished jobs
    app       the web application, and the process that serves it
    guard     who may ask: host, origin, key; `bodies` their type, size and time; `proxy` is the
              JavaScript client's way in
    calls     a call judged, submitted and followed; `answers` is what is told of it, `web` what
              both need
    fal       the hosted protocol: run, stream, submit; `polling` its queue, `realtime` its
              websocket, `shapes` its schemas, `uploads` its files
    openai    OpenAI's images API; `own` is the page and its API
    metrics   /metrics; `tls` makes a certificate for this machine

Needs the extra `server`. Importing this loads none of it.
"""
