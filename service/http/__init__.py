"""Serves a rollout service over HTTP: the OpenAI routes, and room for the routes of trainers.

Knows requests and answers as JSON, keys, limits, text and chat templates. Does not know how tokens are made: every request goes
through the gateway, as one of any other client does.

`server` starts and stops uvicorn; `app` puts the routers together, and `direct_routes` calls those that make samples; `state`
is what every route is given; `routes` guards a route (keys, size and form of a body); `dispatch` sends requests to the gateway
and brings back what comes of them; `http_errors` and `error_handlers` write errors in OpenAI's form. Routers: `health_routes`,
`model_routes`, `completions`, `chat`, `token_routes`. What they share: `request_fields` (a body's fields and the parameters
they say), `limits` (how large an answer may be), `text` (tokenizer, chat template, text of a stream), `tool_calls`, `pieces`
(samples as JSON), `sample_streams` (waiting for samples), `search` (one answer made of many samples) and its `search_threads`.
"""

HTTP_CLIENT = "blockroll-http"
"""Client id of the HTTP face at the gateway."""
