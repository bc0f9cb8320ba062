"""Other APIs of conversations, written as chats: OpenAI's Responses, Anthropic's Messages."""
