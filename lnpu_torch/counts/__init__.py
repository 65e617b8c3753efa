"""What a run did: plain records, as they are saved."""
