def run(*a, **k):
    print(a, k)
