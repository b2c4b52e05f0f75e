"""From a study's records to its report; nothing here trains."""
