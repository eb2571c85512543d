"""How each client API says a request and reads a reply; within the gateway all of them are Chat Completions."""
