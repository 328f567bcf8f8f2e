"""What public corpora there are, their licences and hashes."""
