def items(context):
    return []
