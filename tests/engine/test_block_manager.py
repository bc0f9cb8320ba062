from .paged_fake import chain
def test_x(): assert chain(1,2)
