"""Names of files that both halves, the playbook and the probe of a host have to agree on."""

# In a training environment that is finished: what it was made of, as JSON.
ENVIRONMENT_MARKER = ".tunesmith-environment.json"
