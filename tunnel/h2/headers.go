package h2

// A Header is one header field. Names are lower case.
type Header struct {
	Name, Value string
	// Once says that the value will not be sent again, so that it is kept out
	// of the compression table.
	Once bool
}

// A Request is a CONNECT.
type Request struct {
	// Authority is :authority as it came; nothing has been parsed.
	Authority string
	Headers   []Header
}

// Header returns the value of the first header of that name, or "".
func (r *Request) Header(name string) string { return first(r.Headers, name) }

// A Response answers a Request. EndStream says that no data follows: for a
// server it is a refusal, after which the stream has ended.
type Response struct {
	Status    int
	Headers   []Header
	EndStream bool
}

// Header returns the value of the first header of that name, or "".
func (r *Response) Header(name string) string { return first(r.Headers, name) }

func first(hs []Header, name string) string {
	for i := range hs {
		if hs[i].Name == name {
			return hs[i].Value
		}
	}
	return ""
}
