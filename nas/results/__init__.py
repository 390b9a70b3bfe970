"""What a run has come to: tables, pictures, the report, the dashboard, and the audit of cheaper scores."""
