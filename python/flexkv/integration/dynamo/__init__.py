"""For Dynamo's router."""
