"""A call's routing in the form that operators of others take: checked int32 ids, fp32 weights."""
