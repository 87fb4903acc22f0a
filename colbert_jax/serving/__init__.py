"""An HTTP server over indexes: `colbert-jax serve`, `app.create_app`, `server.serve`.

All but `limits`, `gatherer` and `schema` needs the extra `serve`.
"""
