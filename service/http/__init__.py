"""Serves a rollout service over HTTP: the OpenAI routes, and room for the routes of trainers.

Knows requests and answers as JSON, keys, limits, text and chat templates. Does not know how tokens are made: every request goes
through the gateway, as one of any other client does.

`server` starts and stops uvicorn; `app` puts the routers together; `state` is what every route is given; `routes` guards a route
(keys, size and form of a body); `dispatch` sends requests to the gateway and brings back what comes of them; `http_errors` and `error_handlers` write
errors in OpenAI's form. Routers: `openai_routes`, `health_routes`.
"""
