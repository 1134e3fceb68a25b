"""What Alembic runs: the revisions, on the connection and in the transaction of whoever opens the store."""

from alembic import context

from loraport.serve.store.tables import Table

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Table.metadata, render_as_batch=True)
context.run_migrations()
