import dataclasses
def test_a(train): 
    print(train())
def test_b(train, fault):
    fault("rank=1 phase=backward kind=memory")
    print(train())
